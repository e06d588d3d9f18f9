"""What runs show when they are held beside each other."""
