"""gradret's losses in other libraries' trainers; each module needs its library installed."""
