"""What a run needs and costs, before anything is spent. Pure arithmetic; docs/plan.md states every formula."""
