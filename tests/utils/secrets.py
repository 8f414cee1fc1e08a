"""Twelve secrets, each in the form in which people carry it into commands, addresses and settings."""

from __future__ import annotations

# Words that must not be anywhere afterwards -> a text that holds them.
SECRETS: dict[str, str] = {
    "hf_" + "a1B2" * 9: "hf_" + "a1B2" * 9,
    "pa55w0rd/with+slash": "s3://AKIAQYLPMN5HHHFPZAM2:pa55w0rd/with+slash@bucket/shards/a.tar",
    "t0ps3cret@home": "https://ada:t0ps3cret@home@files.example.org:8443/images.tar",
    "S1gnatureOfAws": "https://b.s3.amazonaws.com/a.tar?X-Amz-Credential=AKIAQYLPMN5HHHFPZAM2&X-Amz-Signature=S1gnatureOfAws",
    "S1gnatureOfAzure%3D": "https://acc.blob.core.windows.net/c/a.tar?sv=2022-11-02&sp=r&sig=S1gnatureOfAzure%3D",
    "QWNjb3VudEtleQ0x": "DefaultEndpointsProtocol=https;AccountName=acc;AccountKey=QWNjb3VudEtleQ0x==;EndpointSuffix=x",
    "wJalrXUtnFEMI0K7": "aws_secret_access_key=wJalrXUtnFEMI0K7/bPxRfiCYEXAMPLEKEY",
    "h0neyNamedByNobody": "https://files.example.org/images.tar?k=h0neyNamedByNobody",
    "ghp_" + "c3D4" * 9: "https://ghp_" + "c3D4" * 9 + "@raw.githubusercontent.com/a/b/main/x.tar",
    "AIza" + "e5F6g" * 7: "AIza" + "e5F6g" * 7,
    "hunter2hunter2": "password=hunter2hunter2",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl",
}
ALL = " ".join(SECRETS.values())


def left_in(text: str) -> list[str]:
    """The secrets that ``text`` still holds."""
    return [secret for secret in (*SECRETS, "AKIAQYLPMN5HHHFPZAM2") if secret in text]
