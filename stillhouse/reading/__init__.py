"""Reading results without Ray: artifacts, selections, and selections as torch datasets."""
