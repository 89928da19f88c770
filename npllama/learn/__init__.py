"""Material for learners: walkthroughs, exercises, plots and the interactive page."""
