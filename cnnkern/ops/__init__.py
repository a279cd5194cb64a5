"""One module an operator: its shape function for tracing, and the public function around it."""
