"""The header of a patch: its reason, its upstream state, and when it can be removed."""

from __future__ import annotations

import email
import email.policy
import re

from sglang_dcp.patch.error import PatchError

FIELDS = ("Why", "How", "Upstream", "Forwarded", "Remove-when", "Last-Update")
_SUBJECT = re.compile(r"\[PATCH\] ([a-z0-9-]+): (.+)")
_FIELD = re.compile(rf"^({'|'.join(FIELDS)}): ", re.MULTILINE)


def read_header(name: str, patch: bytes) -> dict[str, str]:
    """Return the Subject and each of `FIELDS`, with lines joined.

    Raises
    ------
    PatchError
        The Subject does not have the file's name. A field is absent, empty, double or out
        of order. Last-Update is not a date.
    """
    mail = email.message_from_bytes(patch, policy=email.policy.compat32)
    subject = " ".join(str(mail["Subject"] or "").split())
    match = _SUBJECT.fullmatch(subject)
    if match is None or f"{match.group(1)}.patch" != name:
        raise PatchError(
            f"{name}: Subject is {subject!r}; it must be '[PATCH] NAME: what changes' "
            "with the file's NAME"
        )
    body = str(mail.get_payload()).split("\n---\n")[0]
    parts = _FIELD.split(body)
    if tuple(parts[1::2]) != FIELDS or parts[0].strip():
        raise PatchError(
            f"{name}: the header must be {', '.join(FIELDS)}, in this order"
        )
    header = {key: " ".join(text.split()) for key, text in zip(FIELDS, parts[2::2])}
    empty = [key for key, text in header.items() if not text]
    if empty:
        raise PatchError(f"{name}: {empty[0]} is empty")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", header["Last-Update"]):
        raise PatchError(f"{name}: Last-Update must be YYYY-MM-DD")
    return {"Subject": match.group(2), **header}
