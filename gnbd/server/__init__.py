"""gnbd-server: exports, their back ends and filters, reservations, a vote."""
