"""What is wrong with an adapter, with training data, with a finished study."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "adapter": ["examine", "finding_summary"],
        "data": ["data_rows", "examine_data"],
        "study": ["examine_study", "list_findings", "study_alarms"],
        "study_answers": ["answer_agreement"],
    },
)
