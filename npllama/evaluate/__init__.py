"""How well a model predicts, what it is known to answer, and where its time goes."""
