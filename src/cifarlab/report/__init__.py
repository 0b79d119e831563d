"""The page: one self-contained HTML file about runs and studies, made from their folders alone."""
