"""What a server answered, kept as it comes: a run that is broken off asks nothing twice."""

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def request_digest(url: str, path: str, body: Mapping[str, Any]) -> str:
    """A digest of all that a request says: address, model, messages, decoding; not the key."""
    text = json.dumps([url, path, body], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class KeptAnswers:
    """Answers by the digest of their request, in a file of JSON lines that only grows and that only
    its owner may read (mode 0600); prompts are not in it. Without a path they are kept in memory.

    A last line that was cut off in the middle is passed over, and what follows begins a new one.
    """

    def __init__(self, path: Path | None = None):
        self.path, self._lock = path, threading.Lock()
        self._known: dict[str, dict] = {}
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.fchmod(self._file, 0o600)  # also of a file that was there
        self._read(path)

    def _read(self, path: Path) -> None:
        lines = path.read_bytes().split(b"\n")
        for line in lines:
            try:
                row = json.loads(line)
                self._known[row["key"]] = row["answer"]
            except (ValueError, KeyError, TypeError):
                continue  # cut off, or not ours: its prompt is asked again
        if lines[-1]:
            os.write(self._file, b"\n")

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> dict | None:
        """The answer to a request; None where it was not answered."""
        return self._known.get(key)

    def keep(self, key: str, answer: dict) -> None:
        """Keep an answer, in the file before this returns."""
        line = json.dumps({"key": key, "answer": answer}, ensure_ascii=True) + "\n"
        with self._lock:
            self._known[key] = answer
            if self.path is not None:
                os.write(self._file, line.encode())

    def close(self) -> None:
        """Close the file."""
        if self.path is not None:
            os.close(self._file)
            self.path = None
