"""The writer executes plans: it streams rows, writes whole outputs or none, and decides nothing."""

from bamba_quant.writers.plan_writer import write_plan

__all__ = ["write_plan"]
