"""A release: all files of a preset, measured and described, as tasks that any run can finish."""
