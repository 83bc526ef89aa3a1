//! A timeline as a page: one file, which needs nothing else, for a browser.
//!
//! The page's text, looks and code are files of their own in `page/`. The timeline is in it as JSON, in
//! which no `<` is left, so that nothing that a trace says ends the script or becomes part of the page; the
//! code puts text into the page as text only.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::gate::quoted;
use crate::states::meaning;
use crate::timeline::{By, Timeline};

const PAGE: &str = include_str!("page/page.html");
const CSS: &str = include_str!("page/page.css");
const JS: &str = include_str!("page/page.js");

/// The page.
pub fn to_html(line: &Timeline) -> String {
    // In one pass: what is put in is not looked through for places to put more in.
    let mut html = String::new();
    let mut rest = PAGE;
    for (mark, text) in [("/*CSS*/", CSS), ("/*DATA*/", &to_json(line)), ("/*JS*/", JS)] {
        let (before, after) = rest.split_once(mark).expect("the page has its marks, in this order");
        html.push_str(before);
        html.push_str(text);
        rest = after;
    }
    html + rest
}

/// The timeline as JSON, fit to stand in a page. Places and moments are numbers; what is not there is null.
pub fn to_json(line: &Timeline) -> String {
    let list = |items: Vec<String>| format!("[{}]", items.join(","));
    let maybe = |number: Option<u64>| number.map_or("null".into(), |number| number.to_string());
    let place = |place: Option<usize>| maybe(place.map(|place| place as u64));
    let text = |text: &Option<String>| text.as_deref().map_or("null".into(), quoted);

    let events = line.events.iter().map(|event| {
        format!(
            "{{\"what\":{},\"kind\":\"{}\",\"time\":{},\"deadline\":{},\"images\":{},\"unseen\":{}}}",
            quoted(&event.what),
            event.kind.name(),
            event.time,
            maybe(event.deadline),
            event.crash_images,
            event.unseen
        )
    });
    let requests = line.requests.iter().map(|request| {
        let (guest, parent) = match request.by {
            By::Guest(tag) => (Some(tag), None),
            By::Nobody => (None, None),
            By::Request(parent) => (None, Some(parent)),
        };
        let stays = request.stays.iter().map(|stay| {
            format!(
                "{{\"state\":{},\"wait\":{},\"others\":{},\"keeper\":{},\"ahead\":{},\"from\":{},\"to\":{},\
                 \"by\":{}}}",
                quoted(stay.state),
                quoted(stay.wait.words()),
                stay.wait.is_for_others(),
                place(stay.keeper),
                place(stay.ahead),
                stay.from,
                stay.to,
                place(stay.let_go_by)
            )
        });
        format!(
            "{{\"name\":{},\"number\":{},\"life\":{},\"node\":{},\"guest\":{},\"parent\":{},\"what\":{},\"begin\":{},\
             \"end\":{},\"result\":{},\"stays\":{}}}",
            quoted(&request.name()),
            request.number,
            request.life,
            quoted(&request.node),
            maybe(guest),
            place(parent),
            quoted(&request.what),
            request.begin,
            maybe(request.end.map(u64::from)),
            quoted(&request.result),
            list(stays.collect())
        )
    });
    let ops = line.ops.iter().map(|op| {
        let tries = op.tries.iter().map(|(at, how)| format!("[{at},{}]", quoted(how)));
        format!(
            "{{\"request\":{},\"ordinal\":{},\"kind\":{},\"flush\":{},\"file\":{},\"offset\":{},\"len\":{},\
             \"from\":{},\"to\":{},\"how\":{},\"bad\":{},\"tries\":{},\"unsafe\":{},\"safe\":{}}}",
            op.request,
            op.ordinal,
            quoted(op.kind),
            op.is_flush,
            quoted(&op.file),
            op.offset,
            op.len,
            op.from,
            maybe(op.to.map(u64::from)),
            quoted(&op.how),
            op.is_bad,
            list(tries.collect()),
            maybe(op.unsafe_until.map(u64::from)),
            op.is_safe
        )
    });
    let verdict = line.verdict.as_ref().map_or("null".into(), |verdict| {
        let what = quoted(&verdict.text);
        let ranges = |ranges: &[Range<u64>]| {
            list(ranges.iter().map(|range| format!("[{},{}]", range.start, range.end)).collect())
        };
        let left = verdict.left.iter().map(|left| {
            let (kept, lost) = (ranges(&left.kept), ranges(&left.lost));
            format!("{{\"op\":{},\"kept\":{kept},\"lost\":{lost}}}", left.op)
        });
        format!(
            "{{\"at\":{},\"crash\":{},\"text\":{what},\"left\":{},\"more\":{}}}",
            verdict.at,
            verdict.is_crash,
            list(left.collect()),
            list(verdict.more.iter().map(|line| quoted(line)).collect())
        )
    });
    let cause = line.cause.as_ref().map_or("null".into(), |cause| {
        format!("{{\"at\":{},\"text\":{}}}", cause.at, quoted(&cause.text))
    });
    let focus = line.focus.as_ref().map_or("null".into(), |focus| {
        let lines = list(focus.lines.iter().map(|line| quoted(line)).collect());
        format!("{{\"request\":{},\"lines\":{lines}}}", focus.request)
    });
    let names: BTreeSet<&str> =
        line.requests.iter().flat_map(|request| &request.stays).map(|stay| stay.state).collect();
    let states = names.into_iter().filter_map(|name| Some((name, meaning(name)?)));
    let states = states.map(|(name, words)| format!("{}:{}", quoted(name), quoted(words)));
    let json = format!(
        "{{\"title\":{},\"about\":{},\"verdict\":{verdict},\"cause\":{cause},\"calm\":{},\"focus\":{focus},\"timed\":{},\"recorded\":{},\"missed\":{},\n\
         \"states\":{{{}}},\n\
         \"events\":[{}],\n\"requests\":[{}],\n\"ops\":[{}]}}",
        quoted(&line.title),
        list(line.about.iter().map(|line| quoted(line)).collect()),
        maybe(line.calm_from.map(u64::from)),
        line.is_timed,
        text(&line.recorded),
        line.missed,
        states.collect::<Vec<_>>().join(","),
        events.collect::<Vec<_>>().join(",\n"),
        requests.collect::<Vec<_>>().join(",\n"),
        ops.collect::<Vec<_>>().join(",\n")
    );
    // It can only be in a string there.
    json.replace('<', "\\u003c")
}
