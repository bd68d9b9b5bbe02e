//! One pass over images that feeds one stage or several: each image is decoded once, what the networks are shown is cut out of it
//! on threads ahead of them, views of different images share batches, and rows go to the units they belong to.
//!
//! Stages that ride together read the same images in the same order. Each has its own units, batches and shards, so that what it
//! publishes is what it would publish alone.

use std::{
    collections::{HashSet, VecDeque},
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use ovenbird_data::{Error as DataError, annotations::ImageInfo, images::Image};

use crate::{
    AnyStage, Context, Error, Result, Unit,
    artifacts::{Images, Row, RowKind, RowWriter, Shelf},
    clip::encoder::{Encoder, PRECISION, Pending, embedding_problem},
    contract::{Attempted, UnitDraft},
    feed::stream,
};

/// Bytes of decoded images and views that may be ahead of the networks.
const ROOM: usize = 256 << 20;
/// Views that are cut as one job.
const VIEWS_A_JOB: usize = 32;

/// What a network is shown.
pub(crate) struct View {
    pub(crate) pixels: Pixels,
    /// Of an object: see [`ovenbird_data::views::background`].
    pub(crate) background: Option<Vec<u8>>,
}

/// The pixels of a view.
pub(crate) enum Pixels {
    /// At the network's size, or of any.
    Ready(Image),
    /// The square of a rectangle, to be cut where the network runs: see [`ovenbird_data::images::Preprocess::square_of`].
    Square(Arc<Image>, [i64; 4]),
}

/// What is cut out of an image.
pub(crate) enum Cut {
    /// For the network.
    Views(Vec<View>),
    /// The stage's row, which needs no network.
    Whole(Row),
}

/// What a stage sees of images, by their places in the list.
pub(crate) trait Sight: Sync {
    /// How many views an image has. A stage without a network has one.
    fn n_views(&self, place: usize, info: &ImageInfo) -> usize;
    /// Why an image cannot be shown, by its size alone, in words and with what to do about it. It is then an item that failed.
    fn refusal(&self, _place: usize, _info: &ImageInfo) -> Option<(String, &'static str)> {
        None
    }
    /// Cuts some of them.
    fn cut(&self, place: usize, info: &ImageInfo, image: &Arc<Image>, views: Range<usize>) -> Cut;
    /// Where images need not be decoded at their full size: how long their shorter side has to be, in px. Such a draft is not shared
    /// with other riders.
    fn draft_side(&self) -> Option<u32> {
        None
    }
    /// What becomes of the embeddings of all views, `[V, D]`.
    fn row(&self, place: usize, info: &ImageInfo, embeddings: &[f32], dim: usize) -> Row;
}

/// Images and what is known of them without decoding, in ascending id.
pub(crate) struct Frames {
    pub(crate) images: Images,
    pub(crate) infos: Vec<ImageInfo>,
}

impl Frames {
    /// The images of a stage's items: of a dry run they are the first.
    fn infos_of(&self, cx: &Context<'_>) -> &[ImageInfo] {
        &self.infos[..self.infos.len().min(cx.items.len())]
    }

    fn decode(&self, place: usize) -> Result<Image> {
        let ImageInfo { file_name, width, height, .. } = &self.infos[place];
        self.images.decode_sized(file_name, [*width, *height])
    }

    fn decode_draft(&self, place: usize, least_side: u32) -> Result<Image> {
        let ImageInfo { file_name, width, height, .. } = &self.infos[place];
        self.images.decode_draft(file_name, [*width, *height], least_side)
    }
}

/// A stage in a pass.
pub struct Rider<'a> {
    pub(crate) cx: &'a Context<'a>,
    pub(crate) units: &'a [Unit],
    pub(crate) frames: Frames,
    pub(crate) sight: Box<dyn Sight + 'a>,
    pub(crate) encoder: Option<Encoder>,
    pub(crate) port: &'static str,
    pub(crate) rows: RowKind,
}

/// Makes units of several stages that [ride](crate::Stage::RIDES), whose ports `images` and `annotations` are alike, in one pass. Each
/// publishes what it would publish alone.
pub fn run_together(stages: &[(&dyn AnyStage, &[Unit], &Context<'_>)]) -> Result<()> {
    ride(&stages.iter().map(|(stage, units, cx)| stage.rider(units, cx)).collect::<Result<Vec<_>>>()?)
}

/// Makes the units of every rider in one pass. All read the images of the first.
pub(crate) fn ride(riders: &[Rider<'_>]) -> Result<()> {
    let n_threads = riders.iter().map(|rider| rider.cx.threads).max().unwrap_or(1);
    let frames = &riders[0].frames;
    assert!(riders.iter().all(|rider| rider.frames.infos == frames.infos), "BUG: riders of different images");
    for rider in riders {
        rider.frames.images.look_for(rider.frames.infos_of(rider.cx), rider.cx)?;
    }
    let seats: Vec<Seat<'_>> = riders.iter().map(|rider| Seat::of(rider)).collect();
    let mut desks: Vec<Desk<'_>> = riders.iter().map(Desk::of).collect();
    let mut route =
        Route { frames, seats: &seats, aboard: seats.iter().map(|_| Aboard::default()).collect(), place: 0, jobs: VecDeque::new() };
    let prepare = |job: Job| match job {
        Job::Cut { seat, place, views, slot } => {
            let (Seat { cx, sight, .. }, n_views) = (&seats[seat], views.len());
            let cut = cx.attempt(|| {
                // No view, no pixels.
                if n_views == 0 {
                    return Ok(Cut::Views(Vec::new()));
                }
                let image = match sight.draft_side() {
                    None => slot.image(frames, place)?,
                    Some(least_side) => Arc::new(frames.decode_draft(place, least_side)?),
                };
                // What the file itself lacks is said first.
                if let Some((problem, hint)) = sight.refusal(place, &frames.infos[place]) {
                    let path = frames.images.file(&frames.infos[place].file_name)?.path.clone();
                    return Err(Error::Data(DataError::Malformed { path, problem, hint: Some(hint.into()) }));
                }
                Ok(sight.cut(place, &frames.infos[place], &image, views.clone()))
            });
            Ready::Cut { seat, place, is_first: views.start == 0, cut }
        }
        Job::Open { seat, opened } => Ready::Open { seat, opened },
        Job::Take { seat, place } => Ready::Take { seat, place },
        Job::Close { seat } => Ready::Close { seat },
    };
    stream(
        n_threads,
        ROOM,
        || route.next(),
        prepare,
        |ready, n_ready| match ready {
            Ready::Open { seat, opened } => desks[seat].open(*opened),
            Ready::Take { seat, place } => desks[seat].take(place),
            Ready::Cut { seat, place, is_first, cut } => desks[seat].receive(place, is_first, cut, n_ready),
            Ready::Close { seat } => desks[seat].close(),
        },
    )?;
    if let Some(remarks) = frames.images.remarks() {
        riders.iter().for_each(|rider| rider.cx.note(&remarks));
    }
    Ok(())
}

/// An image that several jobs share, decoded by the first of them.
#[derive(Default)]
struct Slot {
    /// Held while it is decoded: the other jobs wait for that.
    image: Mutex<Option<Arc<Image>>>,
}

impl Slot {
    fn image(&self, frames: &Frames, place: usize) -> Result<Arc<Image>> {
        let mut slot = self.image.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(image) = &*slot {
            return Ok(Arc::clone(image));
        }
        let image = Arc::new(frames.decode(place)?);
        *slot = Some(Arc::clone(&image));
        Ok(image)
    }
}

enum Job {
    Open { seat: usize, opened: Box<Opened> },
    Take { seat: usize, place: usize },
    Cut { seat: usize, place: usize, views: Range<usize>, slot: Arc<Slot> },
    Close { seat: usize },
}

enum Ready {
    Open { seat: usize, opened: Box<Opened> },
    Take { seat: usize, place: usize },
    Cut { seat: usize, place: usize, is_first: bool, cut: Attempted<Cut> },
    Close { seat: usize },
}

/// A unit that this process makes, and what of it others hold already.
struct Opened {
    draft: UnitDraft,
    shelf: Shelf,
}

/// What the threads see of a rider.
struct Seat<'a> {
    cx: &'a Context<'a>,
    units: &'a [Unit],
    sight: &'a dyn Sight,
    port: &'static str,
    rows: RowKind,
    /// Bytes of a view; 0 where it is the image itself.
    view_bytes: usize,
    /// What its network computes in.
    precision: Option<&'static str>,
}

impl<'a> Seat<'a> {
    fn of(rider: &'a Rider<'_>) -> Self {
        let Rider { cx, units, sight, encoder, port, rows, .. } = rider;
        let view_bytes = encoder.as_ref().map_or(0, |encoder| if encoder.batch() > 1 { encoder.preprocess.n_numbers() } else { 0 });
        let precision = encoder.as_ref().map(|encoder| encoder.precision);
        Self { cx, units, sight: &**sight, port, rows: *rows, view_bytes, precision }
    }
}

/// Where a rider's units stand on the way.
#[derive(Default)]
struct Aboard {
    next_unit: usize,
    /// Places of the open unit that need no work.
    taken: Option<HashSet<usize>>,
}

/// Gives the jobs of all riders, image by image.
struct Route<'a> {
    frames: &'a Frames,
    seats: &'a [Seat<'a>],
    aboard: Vec<Aboard>,
    place: usize,
    jobs: VecDeque<(Job, usize)>,
}

impl Route<'_> {
    fn next(&mut self) -> Result<Option<(Job, usize)>> {
        while self.jobs.is_empty() && self.place < self.frames.infos.len() {
            let ImageInfo { width, height, .. } = self.frames.infos[self.place];
            let slot = Arc::default();
            let mut image_bytes = 3 * width as usize * height as usize;
            for seat in 0..self.seats.len() {
                self.stop_at(seat, &slot, &mut image_bytes)?;
            }
            self.place += 1;
        }
        Ok(self.jobs.pop_front())
    }

    /// What a rider does at the present image.
    fn stop_at(&mut self, seat: usize, slot: &Arc<Slot>, image_bytes: &mut usize) -> Result<()> {
        let (Seat { cx, units, sight, port, rows, view_bytes, precision }, aboard, place) =
            (&self.seats[seat], &mut self.aboard[seat], self.place);
        let Some(unit) = units.get(aboard.next_unit) else { return Ok(()) };
        if unit.items.start == place {
            // A unit that another process makes is passed by.
            aboard.taken = None;
            if let Some(draft) = cx.begin_claimed(unit)? {
                let items = &cx.items[unit.items.clone()];
                let shelf = Shelf::new(*rows, &cx.donors(&draft, *precision)?, items, &self.frames.infos[unit.items.clone()], port);
                aboard.taken = Some(unit.items.clone().filter(|place| shelf.has(&cx.items[*place])).collect());
                self.jobs.push_back((Job::Open { seat, opened: Box::new(Opened { draft, shelf }) }, 0));
            }
        }
        if let Some(taken) = aboard.taken.as_ref().filter(|_| unit.items.contains(&place)) {
            if taken.contains(&place) {
                self.jobs.push_back((Job::Take { seat, place }, 0));
            } else {
                let n_views = sight.n_views(place, &self.frames.infos[place]);
                for start in (0..n_views.max(1)).step_by(VIEWS_A_JOB) {
                    let views = start..n_views.min(start + VIEWS_A_JOB);
                    // The first job that needs the image carries its weight.
                    let weight = views.len() * view_bytes + if views.is_empty() { 0 } else { std::mem::take(image_bytes) };
                    self.jobs.push_back((Job::Cut { seat, place, views, slot: Arc::clone(slot) }, weight));
                }
            }
        }
        if unit.items.end == place + 1 {
            aboard.next_unit += 1;
            if aboard.taken.take().is_some() {
                self.jobs.push_back((Job::Close { seat }, 0));
            }
        }
        Ok(())
    }
}

/// Where a rider's views become rows.
struct Desk<'a> {
    cx: &'a Context<'a>,
    frames: &'a Frames,
    sight: &'a dyn Sight,
    encoder: Option<&'a Encoder>,
    rows: RowKind,
    port: &'static str,
    /// Not encoded yet.
    views: Vec<View>,
    /// The batch that the network was given last.
    in_flight: Option<Pending>,
    /// Of views that are encoded, of the images that wait.
    embeddings: Vec<f32>,
    /// Images whose rows are not written yet, in order.
    waiting: VecDeque<Waiting>,
    open: Option<OpenUnit>,
}

struct OpenUnit {
    shard: RowWriter,
    shelf: Shelf,
    draft: UnitDraft,
    n_taken: usize,
    n_rows: usize,
    /// The last image that was left out.
    failed: Option<usize>,
}

enum Waiting {
    ForViews { place: usize, n_views: usize },
    Whole(Row),
}

impl<'a> Desk<'a> {
    fn of(rider: &'a Rider<'_>) -> Self {
        Self {
            cx: rider.cx,
            frames: &rider.frames,
            sight: &*rider.sight,
            encoder: rider.encoder.as_ref(),
            rows: rider.rows,
            port: rider.port,
            views: Vec::new(),
            in_flight: None,
            embeddings: Vec::new(),
            waiting: VecDeque::new(),
            open: None,
        }
    }

    fn dim(&self) -> usize {
        self.encoder.map_or(0, Encoder::dim)
    }

    fn open(&mut self, opened: Opened) -> Result<()> {
        let Opened { draft, shelf } = opened;
        let file = draft.create_at(self.port, self.rows.file_name())?;
        let shard = RowWriter::new(self.rows, file, &draft.unit().fingerprint, self.dim(), self.encoder.map(|encoder| encoder.space))?;
        self.open = Some(OpenUnit { shard, shelf, draft, n_taken: 0, n_rows: 0, failed: None });
        Ok(())
    }

    fn unit(&mut self) -> &mut OpenUnit {
        self.open.as_mut().expect("BUG: a unit is opened before its images come")
    }

    fn take(&mut self, place: usize) -> Result<()> {
        let (item, image) = (self.cx.items[place], self.frames.infos[place].id);
        let unit = self.unit();
        let row = unit.shelf.take(&item, image)?;
        unit.n_taken += 1;
        self.waiting.push_back(Waiting::Whole(row));
        self.write_whole()
    }

    fn receive(&mut self, place: usize, is_first: bool, cut: Attempted<Cut>, n_ready: usize) -> Result<()> {
        let name = &self.frames.infos[place].file_name;
        let cx = self.cx;
        let unit = self.unit();
        if unit.failed == Some(place) {
            return Ok(());
        }
        match cx.kept(&unit.draft, name, cut, cx.items.len())? {
            None => unit.failed = Some(place),
            Some(Cut::Whole(row)) => self.waiting.push_back(Waiting::Whole(row)),
            Some(Cut::Views(views)) => {
                if is_first {
                    self.waiting.push_back(Waiting::ForViews { place, n_views: self.sight.n_views(place, &self.frames.infos[place]) });
                }
                self.views.extend(views);
            }
        }
        while let Some(encoder) = self.encoder.filter(|encoder| self.views.len() >= encoder.batch()) {
            self.embed(encoder, encoder.batch(), n_ready)?;
            cx.proceed()?;
        }
        self.write_whole()?;
        cx.proceed()
    }

    /// Sends some views through the network. While an accelerator is at work on a batch, the next one is put together and sent.
    fn embed(&mut self, encoder: &Encoder, n_views: usize, n_ready: usize) -> Result<()> {
        let batch = encoder.upload(&self.views[..n_views]);
        self.views.drain(..n_views);
        self.embeddings.extend(self.in_flight.take().into_iter().flat_map(Pending::rows));
        self.in_flight = Some(encoder.begin(&batch)?);
        self.cx.flow(n_views, n_ready);
        Ok(())
    }

    /// Writes the images at the front whose views are all encoded.
    fn write_whole(&mut self) -> Result<()> {
        let (dim, mut used, mut n_written) = (self.dim(), 0, 0);
        while let Some(front) = self.waiting.pop_front() {
            let row = match front {
                Waiting::Whole(row) => row,
                Waiting::ForViews { place, n_views } => {
                    let n_numbers = n_views * dim;
                    if self.embeddings.len() - used < n_numbers {
                        self.waiting.push_front(Waiting::ForViews { place, n_views });
                        break;
                    }
                    used += n_numbers;
                    let (info, embeddings) = (&self.frames.infos[place], &self.embeddings[used - n_numbers..used]);
                    if let Some((encoder, problem)) = self.encoder.zip(embedding_problem(embeddings, dim)) {
                        let result: Result<Row> = Err(encoder.senseless(&format!("image `{}`: {problem}", info.file_name)));
                        let unit = self.open.as_ref().expect("BUG: a unit is opened before its images come");
                        self.cx.kept(&unit.draft, &info.file_name, Attempted { result, attempts: 1 }, self.cx.items.len())?;
                        continue;
                    }
                    self.sight.row(place, info, embeddings, dim)
                }
            };
            let unit = self.open.as_mut().expect("BUG: a unit is opened before its images come");
            unit.n_rows += row.len();
            unit.shard.push(row)?;
            n_written += 1;
        }
        self.embeddings.drain(..used);
        if n_written > 0 {
            self.cx.tick(n_written);
        }
        Ok(())
    }

    fn close(&mut self) -> Result<()> {
        if let Some(encoder) = self.encoder.filter(|_| !self.views.is_empty()) {
            self.embed(encoder, self.views.len(), 0)?;
        }
        self.embeddings.extend(self.in_flight.take().into_iter().flat_map(Pending::rows));
        self.write_whole()?;
        assert!(self.waiting.is_empty() && self.embeddings.is_empty(), "BUG: a unit ends with all its views encoded");
        let OpenUnit { shard, draft, n_taken, n_rows, .. } = self.open.take().expect("BUG: a unit is closed once");
        shard.finish()?;
        let counts = [("images", draft.unit().items.len()), ("rows", n_rows), ("taken", n_taken)];
        let mut metrics: std::collections::BTreeMap<_, serde_json::Value> = counts.map(|(name, n)| (name.to_owned(), n.into())).into();
        if let Some(encoder) = self.encoder {
            metrics.insert(PRECISION.into(), encoder.precision.into());
        }
        self.cx.commit(draft, metrics)
    }
}
