"""One module for each analysis notebook: factors, doses, trade-offs, power, labels, repairs,
declared tests.
"""
