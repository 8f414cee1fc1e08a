"""Send a built repository to the Hub: one commit, or none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from ..utils.files import readable_size
from ..utils.hub_waits import limit_waiting
from ..utils.redaction import redact
from ..utils.versions import library_versions
from .contents import (
    CARD,
    CONFIG,
    EVAL_RESULTS,
    OWN_EVAL_RESULTS,
    PublishError,
    check_secrets,
    list_left_behind,
    list_published,
)
from .licences import LICENCE_FILE
from .publishable import check_licence, check_publishable

_SHOWN = 5  # files that a warning names
logger = logging.get_logger(__name__)
# A part of a repository -> the files that show that it is published now, and those that an earlier publication left.
_PARTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "the encoder": (
        CONFIG,
        ("*config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json", "*_equissl.py"),
    ),
    "the card": (CARD, (CARD, LICENCE_FILE, "results.json", f"{EVAL_RESULTS}/{OWN_EVAL_RESULTS}-*")),
    "native/": ("native/*", ("native/*",)),
    "pretraining/": ("pretraining/*", ("pretraining/*",)),
    "figures/": ("figures/*", ("figures/*",)),
}


def push_repository(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload encoder",
    token: str | None = None,
    licence_copy: str | Path | None = None,
) -> CommitInfo:
    """Check ``directory`` and upload it in one commit; an interruption leaves the repository as it was.

    Weights are sent first and stay on the Hub's side, so that a second call after an interruption sends only what had
    not arrived. Files that an earlier publication left in the parts that are published now (shards, figures of another
    number) are deleted in the same commit. Other files in the repository, and parts that ``directory`` lacks, stay.
    Progress bars are those of ``huggingface_hub``.

    Args:
        directory: What ``build_repository`` wrote, or another folder that ``check_publishable`` accepts. Only what
            ``list_published`` lists goes up.
        repo_id: "name/model"; created if it does not exist.
        private: Create it as private. An existing public repository is then refused, not published to.
        revision: Branch; created from the main branch if it does not exist.
        commit_message: Title of the commit.
        token: ``None``: that of ``hf auth login`` or ``HF_TOKEN``.
        licence_copy: The licence's text, a file that goes up as ``LICENSE.md``, whatever lies in ``directory``.

    Returns:
        The commit; the newest one of the branch if nothing has changed.

    Raises:
        PublishError: ``check_publishable`` or ``check_licence`` refuses it, rights or network are missing, ...; it says
            what to do.
    """
    check_publishable(directory)
    check_licence(directory)
    with explain_hub_errors(repo_id):
        repo_id = create_repository(repo_id, private=private, token=token)
        api = _client(token)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        head = api.model_info(repo_id, revision=revision).sha
        files = list_published(directory)
        if licence_copy is not None:
            files[LICENCE_FILE] = Path(licence_copy)
            check_secrets({LICENCE_FILE: files[LICENCE_FILE]})
        _say_left_behind(directory)
        gone, left = _find_earlier(api.list_repo_files(repo_id, revision=head), files)
        commit = api.create_commit(  # upload_folder may split a folder into several commits
            repo_id,
            [*(CommitOperationDelete(name) for name in gone), *(CommitOperationAdd(*item) for item in files.items())],
            commit_message=commit_message,
            revision=revision,
            parent_commit=head,
        )
    if left:
        logger.warning("%s on the Hub is of an earlier publication and stays as it is.", " and ".join(left))
    if commit.oid == head:
        logger.info("Nothing has changed since commit %s of %s.", head, repo_id)
    return commit


def create_repository(
    repo_id: str, *, private: bool | None = None, token: str | None = None, repo_type: str = "model"
) -> str:
    """Create the repository, of a "model" or a "dataset", if it does not exist.

    Returns:
        Its full name: with the user's name in front where ``repo_id`` has none.

    Raises:
        PublishError: It cannot be created, or it is public and ``private`` is wanted.
    """
    with explain_hub_errors(repo_id):
        validate_repo_id(repo_id)
        if token is None and get_token() is None:
            raise LocalTokenNotFoundError("no token")  # otherwise the Hub would say that there is no repository
        api = _client(token)
        repo_id = api.create_repo(repo_id, private=private, repo_type=repo_type, exist_ok=True).repo_id
        if private and not api.repo_info(repo_id, repo_type=repo_type).private:
            where = f"{constants.ENDPOINT}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
            raise PublishError(
                f"{repo_id} exists and is public, and you asked for a private one. Make it private in its settings "
                f"({where}/settings), choose another name, or leave out `private`."
            )
    return repo_id


def account(repo_id: str, *, token: str | None = None) -> str:
    """Ask the Hub for the user's name, which shows before any work that network and login are there.

    Raises:
        PublishError: One of them is missing, or ``repo_id`` cannot be a name.
    """
    with explain_hub_errors(repo_id):
        validate_repo_id(repo_id)
        return str(_client(token).whoami()["name"])


def describe(directory: str | Path) -> str:
    """Show what would be uploaded: each file with its size, and the card.

    Raises:
        PublishError: As ``check_publishable``.
    """
    check_publishable(directory)
    files = list_published(directory)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    lines = [f"{readable_size(size):>10}  {name}" for name, size in sizes.items()]
    total = f"{readable_size(sum(sizes.values())):>10}  in {len(sizes)} files"
    _say_left_behind(directory)
    return "\n".join([*lines, total, "", files[CARD].read_text(encoding="utf-8")])


def _say_left_behind(directory: str | Path) -> None:
    if names := list_left_behind(directory):
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        logger.warning(
            "Not uploaded, as neither the card nor a config names them: %s%s.", ", ".join(names[:_SHOWN]), more
        )


@contextmanager
def explain_hub_errors(repo_id: str) -> Iterator[None]:
    """Turn what goes wrong with the Hub inside the block into a ``PublishError`` that says what to do.

    No secret is repeated. Errors that are not the Hub's pass as they are.
    """
    limit_waiting()
    try:
        yield
    except PublishError:
        raise
    except Exception as error:
        message = _explain(error, repo_id)
        if message is None:
            raise
        raise PublishError(redact(message)) from error


def _explain(error: BaseException, repo_id: str) -> str | None:
    login = "Log in with `hf auth login`, or set HF_TOKEN, with a token that may write."
    again = "Nothing is half-published. Try again: only what has not arrived is sent then."
    while isinstance(error, RuntimeError) and error.__cause__ is not None:  # the uploading threads wrap errors
        error = error.__cause__
    if isinstance(error, HFValidationError):
        return f"{repo_id!r} is not the name of a repository. Expected name/model: letters, digits, '-', '_' and '.'."
    if isinstance(error, LocalTokenNotFoundError):
        return f"{repo_id} cannot be published: you are not logged in. {login}"
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo_id} cannot be published: HF_HUB_OFFLINE=1 is set. Unset it and try again."
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no such branch. Name another revision, or leave it out for the main branch."
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo_id} does not exist, or your token may not see it. Check the name and the account. {login}"
    if isinstance(error, HfHubHTTPError):
        return _explain_status(error, repo_id, login, again)
    said = (str(error).strip().splitlines() or [""])[0][:200]
    if "xet-write-token" in said:
        return f"{constants.ENDPOINT} has no Xet storage, or is busy ({said}). For the former set HF_HUB_DISABLE_XET=1."
    if isinstance(error, PermissionError) and type(error).__module__.startswith("hf_xet"):
        return f"The Hub's storage does not let you write to {repo_id} ({said}). {login}"
    if isinstance(error, (HTTPError, ConnectionError, TimeoutError, RuntimeError)):
        return f"{constants.ENDPOINT} cannot be reached, or the connection broke ({said}). {again}"
    if isinstance(error, ValueError) and "metadata in README.md" in str(error):
        return f"The Hub does not accept the card of {repo_id}. {error}"
    return None


def _explain_status(error: HfHubHTTPError, repo_id: str, login: str, again: str) -> str:
    """Say what an HTTP status means for a publication."""
    status = error.response.status_code
    said = error.server_message or ""
    if status == 401:
        return f"{repo_id} cannot be published: the token is missing, wrong or expired. {login}"
    if status in (402, 403):
        return (
            f"{repo_id} cannot be published: your token has no right to write there ({said}). Name a repository of "
            "your own or of an organisation that you may write to, or use another token: `hf auth login`."
        )
    if status in (409, 412):
        return f"{repo_id} has changed meanwhile ({said}). {again}"
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        return f"The Hub asks for patience (rate limit){f': {wait} s' if wait else ''}. {again}"
    if status >= 500:
        return f"The Hub has trouble of its own (status {status}). {again}"
    return f"The Hub refused {repo_id} (status {status}): {said or str(error).strip().splitlines()[0]}"


def _client(token: str | None) -> HfApi:
    return HfApi(token=token, library_name="hf_equissl", library_version=library_versions().get("hf-equissl"))


def _find_earlier(there: list[str], files: Mapping[str, Path]) -> tuple[list[str], list[str]]:
    """List files on the Hub to delete, and parts on the Hub that are not published now."""
    gone: list[str] = []
    left: list[str] = []
    for part, (sign, patterns) in _PARTS.items():
        old = [name for name in there if any(_matches(name, pattern) for pattern in patterns)]
        if any(_matches(name, sign) for name in files):
            gone += [name for name in old if name not in files]
        elif old:
            left.append(part)
    return gone, left


def _matches(name: str, pattern: str) -> bool:
    """Match as ``fnmatch`` does, but patterns without a folder match files of the root only."""
    return fnmatch(name, pattern) and ("/" in pattern or "/" not in name)
