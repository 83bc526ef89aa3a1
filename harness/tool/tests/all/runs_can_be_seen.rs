//! `sim replay --html` and `--perfetto`: what they write is there and can be read, and a browser draws the page.

use std::fmt::Write;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::common::{Place, browser};

const OLD: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/../sim/regressions/a_failed_shrink_may_be_on_disk.trace");

fn data_of(html: &str) -> Value {
    let (_, rest) = html.split_once("id=\"data\">").expect("it has data");
    let (json, _) = rest.split_once("</script>").expect("it ends");
    serde_json::from_str(json).expect("it is JSON")
}

fn text_of(place: &Place, name: &str) -> String {
    std::fs::read_to_string(place.path(name)).expect("it was written, as text")
}

/// The page as the browser has it when the page's code has run.
fn drawn(browser: &str, page: &Path) -> String {
    let folder = page.parent().expect("a folder").join("browser");
    let mut command = Command::new("timeout");
    command.args(["120", browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]);
    command.arg("--window-size=1400,900");
    command.arg(format!("--user-data-dir={}", folder.display()));
    let out = command.arg(format!("file://{}", page.display())).output().expect("it runs");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).expect("text")
}

#[test]
fn a_replayed_trace_is_written_as_a_page_and_for_perfetto() {
    let place = Place::new();
    let said = place.ok(&format!("cowbell sim replay {OLD} --html page.html --perfetto run.json"));
    assert!(said.contains("no failure"), "{said}");
    let data = data_of(&text_of(&place, "page.html"));
    let of_guests = |request: &&Value| !request["guest"].is_null();
    let requests = data["requests"].as_array().expect("a list");
    assert_eq!(requests.iter().filter(of_guests).count(), 2);
    assert!(data["recorded"].as_str().is_some_and(|said| said.contains("a crash left")), "{data}");
    let run: Value = serde_json::from_str(&text_of(&place, "run.json")).expect("it is JSON");
    let begins = |event: &&Value| event["ph"] == "b" && event["id"] == "r0" && event["ts"].is_u64();
    let events = run["traceEvents"].as_array().expect("a list");
    assert!(events.iter().any(|event| begins(&event)), "{run}");

    let out = place.ours(&format!("cowbell sim replay {OLD} --html no/such/folder"));
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!((out.status.code(), said.lines().count()), (Some(1), 1), "{said}");
}

#[test]
fn a_browser_draws_it_and_runs_nothing_that_a_trace_says() {
    let Some(browser) = browser() else { return };
    let place = Place::new();
    let trace = std::fs::read_to_string(OLD).expect("it is there");
    let (head, _) = trace.split_once("verdict").expect("it has a verdict");
    let hostile = "</script><script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">";
    std::fs::write(place.path("hostile.trace"), format!("{head}verdict {hostile}\n"))
        .expect("written");
    place.ok("cowbell sim replay hostile.trace --html page.html");
    let html = text_of(&place, "page.html");
    let data = data_of(&html);
    let page = drawn(browser, &place.path("page.html"));
    assert!(page.contains("data-ready=\"yes\""), "{page}");
    for what in ["events", "requests", "ops"] {
        let count = data[what].as_array().expect("a list").len();
        assert!(page.contains(&format!("data-{what}=\"{count}\"")), "{what}: {count}");
    }
    // As text it is there, as anything else it is not.
    assert!(page.contains("onerror="), "the verdict is shown");
    assert!(!page.contains("<img"), "{page}");
    assert!(page.contains("<title>cowbell: 2 requests"), "{page}");
}

/// `bench --trace`: the request that took longest is named, its time is told by states, and it is drawn.
#[test]
fn a_benchmark_draws_its_slowest_request() {
    let place = Place::new();
    place.ok("cowbell create -f qcow2 disk.qcow2 16M");
    let bench = "cowbell bench -f qcow2 -w -c 300 -d 8 --flush-interval 50 -s 8k -S 72k";
    let said = place.ok(&format!("{bench} --trace slow.html disk.qcow2"));
    let lines: Vec<&str> = said.lines().collect();
    let at = lines.iter().position(|line| line.starts_with("Slowest of "));
    let at = at.unwrap_or_else(|| panic!("{said}"));
    // 300 writes, and a flush after each 50.
    let total: u64 =
        lines[at].split(' ').nth(2).and_then(|word| word.parse().ok()).expect("so many");
    assert!((300..=310).contains(&total), "{said}");

    let data = data_of(&text_of(&place, "slow.html"));
    let focus = &data["focus"];
    let request = &data["requests"][focus["request"].as_u64().expect("a place") as usize];
    assert!(!request["guest"].is_null() && !request["end"].is_null(), "{request}");
    assert!(lines[at].contains(request["name"].as_str().expect("a name")), "{said}");
    for (line, told) in focus["lines"].as_array().expect("a list").iter().zip(&lines[at..]) {
        assert_eq!(line.as_str(), Some(*told));
    }
    let states = request["stays"].as_array().expect("a list");
    assert!(!states.is_empty());
    for stay in states {
        let name = stay["state"].as_str().expect("a name");
        assert!(
            lines[at..].iter().any(|line| line.contains(&format!(" in {name}: "))),
            "{name}: {said}"
        );
    }
    // Nothing that was drawn took longer.
    let time = |event: &Value| {
        let at = event.as_u64().expect("an event") as usize;
        data["events"][at]["time"].as_u64().expect("a time")
    };
    let took = |request: &Value| time(&request["end"]) - time(&request["begin"]);
    let ended = |request: &&Value| !request["guest"].is_null() && !request["end"].is_null();
    let begun = |request: &&Value| request["begin"].as_u64() > Some(0);
    let requests = data["requests"].as_array().expect("a list");
    let most = requests.iter().filter(ended).filter(begun).map(took).max();
    assert_eq!(most, Some(took(request)), "{said}");
    assert!(took(request) < 60_000_000_000, "{said}");

    place.ok(&format!("{bench} --trace slow.json disk.qcow2"));
    let run: Value = serde_json::from_str(&text_of(&place, "slow.json")).expect("it is JSON");
    assert!(run["traceEvents"].as_array().is_some_and(|events| events.len() > 10), "{run}");
    let out = place.ours(&format!("{bench} --trace slow.txt disk.qcow2"));
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && said.contains("is drawn as a page"), "{said}");
    assert!(place.ok("cowbell check -f qcow2 disk.qcow2").contains("No errors"));
}

/// A hundred thousand events: only what is seen is drawn. A frame takes a few milliseconds; half a second is allowed.
#[test]
fn a_browser_draws_a_long_run() {
    const EVENTS: usize = 100_000;
    let Some(browser) = browser() else { return };
    let place = Place::new();
    place.ok(&format!("cowbell sim replay {OLD} --html page.html"));
    let html = text_of(&place, "page.html");
    let (before, rest) = html.split_once("id=\"data\">").expect("it has data");
    let (_, after) = rest.split_once("</script>").expect("it ends");
    // Requests of four events each, three at a time.
    let (mut events, mut requests, mut ops) = (String::new(), String::new(), String::new());
    for at in 0..EVENTS {
        let comma = if at == 0 { "" } else { "," };
        let kind = if at % 2 == 0 { "submit" } else { "complete" };
        let _ = write!(
            events,
            "{comma}{{\"what\":\"event {at}\",\"kind\":\"{kind}\",\"time\":{at},\"deadline\":null,\"images\":0,\
             \"unseen\":0}}"
        );
        if at % 2 == 1 || at + 6 >= EVENTS {
            continue;
        }
        let (place, to) = (at / 2, at + 5);
        let _ = write!(
            requests,
            "{comma}{{\"name\":\"request {place}\",\"number\":{place},\"life\":0,\"node\":\"n0\",\"guest\":{place},\"parent\":null,\
             \"what\":\"write\",\"begin\":{at},\"end\":{to},\"result\":\"ok\",\"stays\":[{{\"state\":\"op\",\
             \"wait\":\"its own ops\",\"others\":false,\"keeper\":null,\"ahead\":null,\"from\":{at},\"to\":{to},\
             \"by\":null}}]}}"
        );
        let _ = write!(
            ops,
            "{comma}{{\"request\":{place},\"ordinal\":0,\"kind\":\"write\",\"flush\":{},\"file\":\"f0\",\
             \"offset\":0,\"len\":512,\"from\":{at},\"to\":{to},\"how\":\"ok\",\"bad\":false,\"tries\":[]}}",
            place % 16 == 0
        );
    }
    let data = format!(
        "{{\"title\":\"a long run\",\"about\":[],\"verdict\":null,\"recorded\":null,\"missed\":0,\
         \"events\":[{events}],\"requests\":[{requests}],\"ops\":[{ops}]}}"
    );
    // Each frame is drawn at once, not when the screen is ready for it: forty of them, of which some show all and
    // some a few events.
    let at_once = "<script>window.requestAnimationFrame = (draw) => draw();</script>";
    let steps = "<script>
        const began = performance.now();
        for (let frame = 0; frame < 40; frame++) {
            dispatchEvent(new KeyboardEvent('keydown', { key: frame % 4 ? 'ArrowRight' : '+' }));
        }
        document.body.dataset.took = Math.round(performance.now() - began);
    </script></body>";
    let html =
        format!("{before}id=\"data\">{data}</script>{at_once}{after}").replace("</body>", steps);
    std::fs::write(place.path("long.html"), html).expect("written");
    let page = drawn(browser, &place.path("long.html"));
    assert!(page.contains(&format!("data-events=\"{EVENTS}\"")), "not drawn");
    let (_, took) = page.split_once("data-took=\"").expect("it was measured");
    let took: u64 = took.split('"').next().and_then(|ms| ms.parse().ok()).expect("a number");
    assert!(took < 20_000, "40 frames took {took} ms");
}
