"""The words of the table `estimates`: outcomes, contrasts, groups, populations and units."""

UNSAFE, REFUSED = "unsafe-response rate (percent)", "refusal rate (percent)"
UNREFUSED = "non-refusal rate (percent)"  # harmful prompts answered without refusing
BEGUN_HARMFUL, BEGUN_BENIGN = (
    f"probability that the answer to a {kind} prompt begins as a refusal (percent)"
    for kind in ("harmful", "benign")
)
ACCURACY_AMB, ACCURACY_DIS = "accuracy, ambiguous (percent)", "accuracy, disambiguated (percent)"
BIAS_AMB = "bias score, ambiguous (-100 to 100)"
BIAS_DIS = "bias score, disambiguated (-100 to 100)"
FLIPS = "BBQ answers that change with the order of the options (percent)"
RIGHT = "right BBQ answers (percent)"
INFORMED = "information in BBQ answers (largest t)"
INFORMED_ON_PERSONS = "information in BBQ answers about persons (largest t)"
LOSS, CORRECT = "utility: loss (nats per token)", "utility: correct answers (percent)"
FRONT = (
    "on the Pareto front (percent): fewer unsafe responses, fewer refusals of benign prompts, more"
    " accuracy in ambiguous contexts, less utility loss"
)
LEVEL, CHANGE = "level", "change against the base model"
CHANGE_HERE = "change against the base model, these prompts"
LOWEST = "change if the unscored were as low as can be"
HIGHEST = "change if the unscored were as high as can be"
TRAINED, AS_CONFIGURED, NO_OP, UNTRAINED = "trained", "as configured", "no-op", "untrained"
STOPPED, MIXED_IN = "stopped early", "mixed in"
RUN, SETTINGS, CATEGORY, INIT, MITIGATION = "run", "settings", "category", "init", "mitigation"
ALL, NONE, PRIMARY = "all", "none", "primary"  # of a row without member, against or estimator
SHUFFLED = "answers shuffled among items"
WITHOUT_PRIOR, OVER_ORDERS = "prior of the places divided out", "mean of three orders"
UNREADABLE = "no finding: answers without information"
BOTH = "seeds like these, prompts like these, these base models"
THESE_PROMPTS = "seeds like these, these prompts, these base models"
THESE_RUNS = "these runs, prompts like these, these base models"
TWO_WAY = (
    "mean over runs; two ways: runs within settings (generalised pivot) and {}, joined by MOVER"
)
ONE_RUN = (
    "mean over runs; no setting was run twice, so nothing is known of other seeds; t interval"
    " over {}"
)
HERE = "mean over runs; spread of runs within settings"
UNITS, FAMILY_UNITS = "units (CR2)", "families of prompts (CR2)"
