"""What is known of a run before any slice is paid for."""
