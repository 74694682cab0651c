"""`keel diagnose RUN`: what happened in a run, why, and what to change. Rules and statistics over its record."""
