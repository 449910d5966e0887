//! Says which engine works here, in one line of JSON: the engine's name and the choice, or no name and why.
#![expect(clippy::print_stdout, reason = "a command line program reports on standard output")]

fn main() {
    let (engine, reason) = match hmm_core::open_engine() {
        Ok((_engine, choice)) => (format!("\"{}\"", choice.engine.name()), choice.to_string()),
        Err(error) => ("null".to_owned(), error.to_string()),
    };
    let reason = reason.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', " ");
    println!("{{\"engine\": {engine}, \"reason\": \"{reason}\"}}");
}
