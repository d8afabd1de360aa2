//! Names each case of a test, reports it as it is done, and fails the test when one of them failed.

use std::time::Instant;

/// The cases of one test. Case after case runs, also after a failure; [`Checks::finish`] fails the test if any did.
#[must_use = "call finish() at the end of the test"]
pub struct Checks {
    test: &'static str,
    passed: usize,
    failed: Vec<String>,
    finished: bool,
}

impl Checks {
    /// Starts the list of cases of the test that is called `test`.
    pub fn new(test: &'static str) -> Self {
        eprintln!("\n{test}");
        Self {
            test,
            passed: 0,
            failed: Vec::new(),
            finished: false,
        }
    }

    /// Runs one case and reports it. The case returns a word or two on what it saw.
    pub fn check<T: ToString>(&mut self, name: &str, case: impl FnOnce() -> anyhow::Result<T>) {
        let start = Instant::now();
        let result = case();
        let seconds = start.elapsed().as_secs_f32();
        match result {
            Ok(detail) => {
                self.passed += 1;
                eprintln!("  ok      {name}: {} ({seconds:.1} s)", detail.to_string());
            }
            Err(error) => {
                eprintln!("  FAILED  {name}: {error:#} ({seconds:.1} s)");
                self.failed.push(name.to_owned());
            }
        }
    }

    /// Ends the list.
    ///
    /// # Panics
    /// When a case failed.
    pub fn finish(mut self) {
        self.finished = true;
        eprintln!(
            "  {}: {} checks passed, {} failed",
            self.test,
            self.passed,
            self.failed.len()
        );
        assert!(
            self.failed.is_empty(),
            "{}: {} of {} checks failed: {}",
            self.test,
            self.failed.len(),
            self.failed.len() + self.passed,
            self.failed.join(", "),
        );
    }
}

impl Drop for Checks {
    fn drop(&mut self) {
        if !self.finished && !std::thread::panicking() {
            panic!("{}: the test ended without Checks::finish()", self.test);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "1 of 2 checks failed: second")]
    fn a_failed_check_fails_the_test_at_its_end() {
        let mut checks = Checks::new("example");
        checks.check("second", || -> anyhow::Result<&str> {
            anyhow::bail!("on purpose")
        });
        checks.check("third", || Ok("fine"));
        checks.finish();
    }

    #[test]
    #[should_panic(expected = "without Checks::finish()")]
    fn checks_that_are_never_finished_fail_the_test() {
        drop(Checks::new("example"));
    }
}
