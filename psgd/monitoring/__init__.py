"""Output for people: metrics, the progress display, figures and HTML pages."""
