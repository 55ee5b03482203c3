"""EPO inside other trainers, one module or package for each. Nothing else of epo imports this room."""
