//! What an operator sees: the program itself, run in a folder of its own. One binary, because each links libtorch.

mod support;

mod errors;
mod quickstart;
mod surface;
mod tidy;
