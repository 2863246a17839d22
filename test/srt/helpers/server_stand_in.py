"""Stands for a live server in tests of what starts and asks several of them."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from sglang_dcp.demo.server import ServerFailed


class Server:
    """Tells `events` what is asked of it. One that is `broken` never gets ready."""

    def __init__(self, name: str, events: list[str], broken: bool, log: Path) -> None:
        self._name, self._events, self._broken = name, events, broken
        self.base_url, self.log_path = name, log
        self.returncode: Optional[int] = None

    def __enter__(self) -> Server:
        self._events.append(f"start {self._name}")
        return self

    def __exit__(self, *error: object) -> None:
        self._events.append(f"end {self._name}")

    def stop(self) -> None:
        self._events.append(f"stop {self._name}")

    def wait_ready(self, timeout: float) -> float:
        if self._broken:
            raise ServerFailed("not ready")
        return 0.0

    def log_tail(self) -> str:
        return "its log"
