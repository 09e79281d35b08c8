"""Talk in a terminal with a model on the expert cache."""
