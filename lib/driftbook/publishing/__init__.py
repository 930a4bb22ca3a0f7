"""The report, published tables and figures, exports and licences."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "audit_files": ["write_audit"],
        "publish": ["published"],
        "report": ["cost_sentence", "sentence"],
    },
)
