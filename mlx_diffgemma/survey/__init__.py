"""What only its owner's machine can say of this program: checks and measurements in one table."""
