"""For those who learn: walkthroughs, exercises, plots, the page."""
