"""From a failure to a decision, and from there to hosts that stand ready again."""
