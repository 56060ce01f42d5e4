from typing import Any

Layout = Any
OneBit = Any
TopK = Any

def __getattr__(name: str) -> Any: ...
