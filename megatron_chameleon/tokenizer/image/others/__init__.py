"""Networks of other libraries, each with the code that its library has for it."""
