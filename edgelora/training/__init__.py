"""Training: the step, the loop over a data set, and the run that ends in an adapter folder."""
