from typing import Any

Cast = Any
Layout = Any
OneBit = Any
RandomK = Any
TopK = Any

def __getattr__(name: str) -> Any: ...
