"""Running a trained model on any layout: every rank makes the same call, and every rank gets the result."""
