"""A run's policy as a folder for the Hugging Face hub or any tool that reads its layout."""
