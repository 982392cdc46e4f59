"""What is asked: parameters, paths, the grid of runs, and one papermill run."""
