"""Train, measure and compare image classifiers: the most accuracy per minute on the hardware at hand."""

__version__ = "0.1.0"
