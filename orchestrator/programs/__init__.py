"""What is done on the hosts, from window to window, once they stand ready."""
