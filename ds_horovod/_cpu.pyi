from typing import Any

FeedbackState = Any
Layout = Any
families: dict[str, Any]

def __getattr__(name: str) -> Any: ...
