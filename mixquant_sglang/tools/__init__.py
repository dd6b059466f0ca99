"""The commands of ``mixquant``: what a user runs beside a server. Nothing else imports this room."""
