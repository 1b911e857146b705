"""What people and metrics hear of a backup."""
