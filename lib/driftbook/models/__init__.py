"""Load a base model, attach adapters, score and generate."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "adapters": ["attached", "config"],
        "conversations": ["answer_text", "ask", "conversation_ids", "counted_ids"],
        "endpoint": ["Endpoint"],
        "loading": ["load"],
        "requesting": ["Deployed"],
        "scoring": ["Scorer"],
        "templates": ["end_tokens", "notes"],
    },
)
