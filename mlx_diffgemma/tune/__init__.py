"""The fewest steps that keep the answers of a model, found on the machine where it runs."""
