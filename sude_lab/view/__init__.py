"""What is looked at: plots, and widgets that show a picture where no widget runs."""
