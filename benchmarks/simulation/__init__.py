"""A cluster that is not there: the project's own rules on a clock of events, with costs that were measured or given."""
