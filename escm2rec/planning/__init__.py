"""The planner laboratory: which plan, for which cluster, without either."""
