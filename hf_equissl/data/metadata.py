"""What files hold beside their pixels: the orientation is read, and nothing else can cost an image."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from PIL import Image

_ORIENTATION = 0x0112
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Chunks of a PNG file that pixels, transparency and orientation follow from.
_PNG_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf"}
# Segments of a JPEG file that are metadata: not APP0 (JFIF) and APP14 (which tells CMYK from YCCK).
_JPEG_METADATA = {0xE1, 0xFE} | set(range(0xE2, 0xEE)) | {0xEF}
_JPEG_START_OF_SCAN = 0xDA
# Tags of TIFF by which pixels are found and interpreted: sizes, strips and tiles, colours, compression, JPEG tables.
_TIFF_TAGS = {
    *(254, 255, 256, 257, 258, 259, 262, 266, 273, _ORIENTATION, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324),
    *(325, 332, 334, 338, 339, 347, 512, 513, 514, 519, 520, 521, 529, 530, 531, 532),
}
_TIFF_INTEGERS = {1: "B", 3: "H", 4: "I"}
_SAMPLES_PER_PIXEL, _BITS_PER_SAMPLE, _EXTRA_SAMPLES = 277, 258, 338
# Numbers of a file with one plane in place of those of several; ``None`` keeps the first of several numbers.
_ONE_PLANE = {_SAMPLES_PER_PIXEL: 1, 262: 1, 284: 1, _BITS_PER_SAMPLE: None, 339: None}
_TIFF_PLACES = {273, 279, 324, 325}  # offsets and lengths of strips or tiles, those of the first plane first


def find_transposition(image: Image.Image) -> Image.Transpose | None:
    """Find what turns a decoded image upright, by its EXIF or XMP orientation; what cannot be read says nothing."""
    try:
        return _TRANSPOSITIONS.get(image.getexif().get(_ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:  # readers of EXIF raise whatever a wrong tag led them into
        return None


def strip_metadata(content: bytes) -> bytes | None:
    """Leave out of a PNG, JPEG or TIFF file what its pixels and its orientation do not need.

    Returns:
        The smaller file; ``None`` where there is nothing to leave out, or the file is of another or of no kind.
    """
    try:
        if content.startswith(_PNG_SIGNATURE):
            bare = _strip_png(content)
        elif content.startswith(b"\xff\xd8"):
            bare = _strip_jpeg(content)
        elif content.startswith((b"II*\x00", b"MM\x00*")):
            bare = _strip_tiff(content)
        else:
            return None
    except (struct.error, IndexError):  # the file is cut off
        return None
    return None if bare == content else bare


def count_bands(content: bytes) -> tuple[int, int] | None:
    """Read how many bands a TIFF file has, and how many bits each; ``None`` of another kind of file."""
    if not content.startswith((b"II*\x00", b"MM\x00*")):
        return None
    found = {_SAMPLES_PER_PIXEL: 1, _BITS_PER_SAMPLE: 1}
    try:
        for tag, kind, count, place in _read_tiff_entries(content):
            if tag in found and kind in _TIFF_INTEGERS:
                found[tag] = _read_tiff_numbers(content, kind, count, place)[0]
    except struct.error:
        return None
    return found[_SAMPLES_PER_PIXEL], found[_BITS_PER_SAMPLE]


def extract_plane(content: bytes, plane: int) -> bytes:
    """Make a grey TIFF file of one plane of a file whose bands lie in separate planes.

    Its directory stands behind the old content, so that all offsets stay true.

    Raises:
        struct.error: The file is cut off.
    """
    order = "<" if content[:1] == b"I" else ">"
    bands = (count_bands(content) or (1, 16))[0]
    file, entries = bytearray(content + bytes(len(content) % 2)), []
    for tag, kind, count, place in _read_tiff_entries(content):
        numbers = _read_tiff_numbers(content, kind, count, place) if tag in _ONE_PLANE or tag in _TIFF_PLACES else ()
        entry = content[place - 8 : place + 4]
        if tag in _ONE_PLANE:
            number = _ONE_PLANE[tag] or numbers[0]
            entry = struct.pack(order + "HHIHH", tag, 3, 1, number, 0)
        elif tag in _TIFF_PLACES:
            each = count // bands
            chosen = struct.pack(f"{order}{each}I", *numbers[plane * each : (plane + 1) * each])
            if each > 1:
                chosen, offset = struct.pack(order + "I", len(file)), chosen
                file += offset
            entry = struct.pack(order + "HHI", tag, 4, each) + chosen
        if tag not in (_EXTRA_SAMPLES, _ORIENTATION):
            entries.append(entry)
    file[4:8] = struct.pack(order + "I", len(file))
    return bytes(file + struct.pack(order + "H", len(entries)) + b"".join(entries) + bytes(4))


def _strip_png(content: bytes) -> bytes:
    kept = [_PNG_SIGNATURE]
    place = len(_PNG_SIGNATURE)
    while place < len(content):
        length = struct.unpack_from(">I", content, place)[0]
        end = place + length + 12  # length, name and checksum
        if content[place + 4 : place + 8] in _PNG_CHUNKS:
            kept.append(content[place:end])
        place = end
    return b"".join(kept)


def _strip_jpeg(content: bytes) -> bytes:
    kept = [content[:2]]
    place = 2
    while content[place] == 0xFF and content[place + 1] != _JPEG_START_OF_SCAN:
        end = place + 2 + struct.unpack_from(">H", content, place + 2)[0]
        segment = content[place:end]
        if content[place + 1] not in _JPEG_METADATA:
            kept.append(segment)
        elif segment[4:10] == b"Exif\x00\x00":
            kept.append(_keep_orientation(segment[4:]))
        place = end
    return b"".join([*kept, content[place:]])


def _keep_orientation(exif: bytes) -> bytes:
    """Make an EXIF segment of JPEG with the orientation of another one alone; empty where that has none."""
    parsed, alone = Image.Exif(), Image.Exif()
    try:
        parsed.load(exif)
        orientation = parsed.get(_ORIENTATION)
    except MemoryError:
        raise
    except Exception:  # see ``find_transposition``
        return b""
    if orientation not in _TRANSPOSITIONS:
        return b""
    alone[_ORIENTATION] = orientation
    payload = alone.tobytes()
    return b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload


def _strip_tiff(content: bytes) -> bytes:
    """Leave entries out of the first directory of a file; nothing moves, so that all offsets stay true."""
    order = "<" if content[:1] == b"I" else ">"
    directory = struct.unpack_from(order + "I", content, 4)[0]
    entries = [content[place - 8 : place + 4] for tag, _, _, place in _read_tiff_entries(content) if tag in _TIFF_TAGS]
    bare = bytearray(content)
    written = struct.pack(order + "H", len(entries)) + b"".join(entries) + bytes(4)  # no further directory
    bare[directory : directory + len(written)] = written
    return bytes(bare)


def _read_tiff_entries(content: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yield tag, type, count and the place of the value of each entry of a TIFF file's first directory."""
    order = "<" if content[:1] == b"I" else ">"
    directory = struct.unpack_from(order + "I", content, 4)[0]
    for number in range(struct.unpack_from(order + "H", content, directory)[0]):
        place = directory + 2 + 12 * number
        yield *struct.unpack_from(order + "HHI", content, place), place + 8


def _read_tiff_numbers(content: bytes, kind: int, count: int, place: int) -> tuple[int, ...]:
    """Read the numbers of an entry, which stand in it if they fit."""
    order = "<" if content[:1] == b"I" else ">"
    layout = f"{order}{count}{_TIFF_INTEGERS[kind]}"
    where = place if struct.calcsize(layout) <= 4 else struct.unpack_from(order + "I", content, place)[0]
    return struct.unpack_from(layout, content, where)
