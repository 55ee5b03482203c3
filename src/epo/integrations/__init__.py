"""EPO inside other people's trainers. Nothing else of epo imports this room."""
