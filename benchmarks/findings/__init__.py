"""Tables and pictures of `docs/findings.md`, from the results of the sensitivity study and of the comparisons."""
