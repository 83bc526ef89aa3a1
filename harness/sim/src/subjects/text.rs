//! An image's options as text, as traces have them.

use std::fmt;
use std::str::FromStr;

use cowbell_formats::Format;
use cowbell_formats::parts::growth::Grow;

use super::{CLUSTER, FREES, Image, Layout, Medium, State};
use crate::backend::Lie;
use crate::workload::number;

impl fmt::Display for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match self.state {
            State::Cold => "cold",
            State::Warm => "warm",
            State::Zeros => "zeros",
            State::Holes => "holes",
            State::Shared => "shared",
        };
        let grow = match self.grow {
            Grow::Truncate => "truncate",
            Grow::Allocate => "allocate",
            Grow::Write => "write",
        };
        let lie = match self.lie {
            None => "none",
            Some(Lie::FlushDoesNothing) => "flush-does-nothing",
            Some(Lie::FuaDoesNothing) => "fua-does-nothing",
            Some(Lie::ShortIsWhole) => "short-is-whole",
            Some(Lie::ZeroDoesNothing) => "zero-does-nothing",
            Some(Lie::SectorAtATime) => "sector-at-a-time",
        };
        let layout = match self.layout {
            Layout::Plain => "",
            Layout::Split => "layout=split ",
            Layout::Lazy => "layout=lazy ",
            Layout::Tight => "layout=tight ",
            Layout::Stream => "layout=stream ",
        };
        let Image { format, backing, cache, buffers, align, depth, ahead, can_zero, .. } = self;
        write!(f, "format={format} state={state} backing={backing} {layout}cache={cache} ")?;
        if self.long {
            write!(f, "long=true ")?;
        }
        if self.old {
            write!(f, "old=true ")?;
        }
        if self.cluster != CLUSTER {
            write!(f, "cluster={} ", self.cluster)?;
        }
        if let Medium::Device(spare) = self.medium {
            write!(f, "device={spare} ")?;
        }
        if self.frees != FREES {
            write!(f, "frees={} ", self.frees)?;
        }
        if !self.pass_discards {
            write!(f, "pass-discards=false ")?;
        }
        if self.slow {
            write!(f, "slow=true ")?;
        }
        if self.filter {
            write!(f, "filter=true ")?;
        }
        if let Some(size) = self.size {
            write!(f, "size={size} ")?;
        }
        if let Some(beside) = self.beside {
            write!(f, "beside={beside} ")?;
        }
        if let Some(size) = self.beside_size {
            write!(f, "beside-size={size} ")?;
        }
        if self.shares {
            write!(f, "shares=true ")?;
        }
        write!(f, "buffers={buffers} align={align} depth={depth} grow={grow} ahead={ahead} ")?;
        write!(f, "can-zero={can_zero} probed={} lie={lie}", self.probed)
    }
}

impl FromStr for Image {
    type Err = String;

    fn from_str(text: &str) -> Result<Image, String> {
        let mut image = Image::new(Format::Raw);
        for word in text.split_whitespace() {
            let (key, value) = word.split_once('=').ok_or_else(|| format!("'{word}' has no ="))?;
            let wrong = || format!("'{value}' is no {key}");
            let flag = || value.parse().map_err(|_| wrong());
            match key {
                "format" => image.format = Format::from_name(value).ok_or_else(wrong)?,
                "state" => {
                    image.state = match value {
                        "cold" => State::Cold,
                        "warm" => State::Warm,
                        "zeros" => State::Zeros,
                        "holes" => State::Holes,
                        "shared" => State::Shared,
                        _ => return Err(wrong()),
                    };
                }
                "backing" => image.backing = flag()?,
                "long" => image.long = flag()?,
                "old" => image.old = flag()?,
                "layout" => {
                    image.layout = match value {
                        "plain" => Layout::Plain,
                        "split" => Layout::Split,
                        "lazy" => Layout::Lazy,
                        "tight" => Layout::Tight,
                        "stream" => Layout::Stream,
                        _ => return Err(wrong()),
                    };
                }
                "device" => image.medium = Medium::Device(number(value)?),
                "slow" => image.slow = flag()?,
                "beside" => image.beside = Some(Format::from_name(value).ok_or_else(wrong)?),
                "shares" => image.shares = value == "true",
                "filter" => image.filter = flag()?,
                "size" => image.size = Some(number(value)?),
                "beside-size" => image.beside_size = Some(number(value)?),
                "pass-discards" => image.pass_discards = flag()?,
                "frees" => image.frees = number(value)? as usize,
                "cluster" => image.cluster = number(value)?,
                "cache" => image.cache = number(value)? as usize,
                "buffers" => image.buffers = number(value)? as usize,
                "align" => image.align = number(value)? as u32,
                "depth" => image.depth = number(value)? as usize,
                "grow" => {
                    image.grow = match value {
                        "truncate" => Grow::Truncate,
                        "allocate" => Grow::Allocate,
                        "write" => Grow::Write,
                        _ => return Err(wrong()),
                    };
                }
                "ahead" => image.ahead = number(value)?,
                "can-zero" => image.can_zero = flag()?,
                "probed" => image.probed = flag()?,
                "lie" => {
                    image.lie = match value {
                        "none" => None,
                        "flush-does-nothing" => Some(Lie::FlushDoesNothing),
                        "fua-does-nothing" => Some(Lie::FuaDoesNothing),
                        "short-is-whole" => Some(Lie::ShortIsWhole),
                        "zero-does-nothing" => Some(Lie::ZeroDoesNothing),
                        "sector-at-a-time" => Some(Lie::SectorAtATime),
                        _ => return Err(wrong()),
                    };
                }
                _ => return Err(format!("'{key}' is no option of an image")),
            }
        }
        Ok(image)
    }
}
