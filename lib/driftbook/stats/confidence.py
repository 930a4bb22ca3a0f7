"""The confidence level of every interval, its quantiles, and how texts call it."""

CONFIDENCE = 0.95
LOWER, UPPER = (round(0.5 + sign * CONFIDENCE / 2, 9) for sign in (-1, 1))  # .025 and .975
ALPHA = round(1 - CONFIDENCE, 9)  # of a two-sided test that agrees with the interval
BELOW = f"below {ALPHA:g}".replace("0.", ".")  # as texts say it of an adjusted p value
PERCENT = f"{100 * CONFIDENCE:g}%"
INTERVAL = f"{PERCENT} interval"
